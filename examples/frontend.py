"""An SGLang frontend program against a server that runs with --kv-quant blockgtq.

usage: python examples/frontend.py --url http://127.0.0.1:30000

Nothing here knows about the packed cache: ``gen``, ``select`` and ``fork`` are SGLang's own. The
program shares one long prefix between all its calls, so the server answers most of them from
packed rows that the radix cache kept; the last lines show how many tokens that were.
"""

from __future__ import annotations

import argparse
import json
import urllib.request

import sglang as sgl

ARTICLE = """\
The lighthouse at Cape Morrow was built in 1871 after three ships were lost on the reef in one winter. \
Its lamp burned oil until 1924, when it was converted to electricity. The keeper's house stood empty for \
thirty years and is now a small museum, open from May to September. Visitors can climb the 142 steps to \
the gallery, from where whales are often seen in June. The light still works: it flashes twice every ten \
seconds and can be seen from eighteen miles away."""

QUESTIONS = {
    "when": "When was the lighthouse built?",
    "house": "What is the keeper's house now?",
    "steps": "How many steps lead to the gallery?",
}


@sgl.function
def read(s, article: str, questions: dict[str, str]):
    """One article, one choice, several questions side by side, one summary."""
    s += sgl.system("You answer questions about a text in one short sentence.")
    s += sgl.user(f"Read this text.\n\n{article}\n\nIs it about a building or about a person?")
    s += sgl.assistant("It is about a " + sgl.select("topic", choices=["building", "person"]) + ".")

    # Every fork continues from the same prefix; the radix cache stores its rows once.
    forks = s.fork(len(questions))
    for branch, question in zip(forks, questions.values(), strict=True):
        branch += sgl.user(question)
        branch += sgl.assistant(sgl.gen("answer", max_tokens=32, temperature=0))
    for name, branch in zip(questions, forks, strict=True):
        s.set_var(name, branch["answer"].strip())

    s += sgl.user("Sum up the text in one sentence.")
    s += sgl.assistant(sgl.gen("summary", max_tokens=48, temperature=0))


def server_info(url: str) -> dict:
    with urllib.request.urlopen(f"{url}/server_info", timeout=60) as answer:
        return json.load(answer)


def cached_tokens(backend: sgl.RuntimeEndpoint, text: str) -> tuple[int, int]:
    """(prompt tokens, how many of them came from the radix cache) of one more call with this text."""
    body = json.dumps({"text": text, "sampling_params": {"max_new_tokens": 1}}).encode()
    call = urllib.request.Request(f"{backend.base_url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=600) as answer:
        meta = json.load(answer)["meta_info"]
    return meta["prompt_tokens"], meta["cached_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--template", default="chatml", help="SGLang chat template of the model (default: chatml)")
    options = parser.parse_args()
    backend = sgl.RuntimeEndpoint(options.url, chat_template_name=options.template)
    state = read.run(article=ARTICLE, questions=QUESTIONS, backend=backend)

    print(f"topic:   {state['topic']}")
    for name, question in QUESTIONS.items():
        print(f"{question}\n         {state[name]}")
    print(f"summary: {state['summary'].strip()}")

    prompt, cached = cached_tokens(backend, state.text())
    print(f"\nasked again: {cached} of {prompt} prompt tokens came from the radix cache")
    kv = server_info(options.url).get("kv_quant")
    if kv:
        print(f"packed rows: {kv['bytes_per_token']:,} bytes per token, {kv['bf16_bytes_per_token']:,} in bf16")
    else:
        print("this server does not quantize its KV cache; start it with --kv-quant blockgtq")


if __name__ == "__main__":
    main()
