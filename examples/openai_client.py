"""The OpenAI client against a server that runs with --kv-quant blockgtq.

usage: python examples/openai_client.py --url http://127.0.0.1:30000

Two answers to one prompt with their log-probabilities, a chat that arrives piece by piece, and an answer that follows
a JSON schema.
"""

from __future__ import annotations

import argparse
import json

import openai

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Berlin", "Paris", "Rome"]}, "country": {"enum": ["France", "Germany", "Italy"]}},
    "required": ["city", "country"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    client = openai.OpenAI(base_url=f"{parser.parse_args().url}/v1", api_key="none")

    prompt = "The capital of France is"
    two = client.completions.create(
        model="default", prompt=prompt, n=2, max_tokens=8, temperature=0, stop=".", logprobs=1
    )
    for choice in two.choices:
        print(f"{prompt}|{choice.text}|{choice.finish_reason}|{sum(choice.logprobs.token_logprobs):.3f}")

    question = [{"role": "user", "content": "What is the capital of France?"}]
    print("streamed:", end="")
    for piece in client.chat.completions.create(
        model="default", messages=question, max_tokens=24, temperature=0, stream=True
    ):
        print(f"|{piece.choices[0].delta.content or ''}", end="", flush=True)
    print()

    whole = client.chat.completions.create(
        model="default",
        messages=question,
        max_tokens=32,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "capital", "schema": SCHEMA}},
    )
    print("schema:", json.loads(whole.choices[0].message.content))


if __name__ == "__main__":
    main()
