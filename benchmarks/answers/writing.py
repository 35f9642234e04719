"""Free answers: long ones, ones that end where the model ends them, and bash scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..tasks.prompts import Tokens
from .drift import distinct, drift_rows, token_rows
from .engines import Engine, Reply
from .questions import Question, chat_ids
from .record import Answer
from .rows import Row, average, extreme, share

LONG_TOKENS, SCRIPT_TOKENS, OPEN_TOKENS = 2000, 200, 512

LONG = (
    "Write a novel about {}. Begin with the first chapter, and do not end before the tenth; every chapter has its own "
    "title and at least a thousand words.",
    "Write a handbook of fifty numbered sections on {}. Every section has a heading and several paragraphs.",
    "Write the complete history of {} from its beginnings to today, year by year, in as much detail as you can.",
    "Write a long conversation of a teacher and a student about {}. The student asks a hundred questions, and the "
    "teacher answers every one at length.",
)
LONG_SUBJECTS = (
    ("a lighthouse keeper who finds a map", "running a small bakery", "the bicycle", "how computers store numbers"),
    ("two sisters who inherit a railway", "growing vegetables in a cold country", "the printing press", "the tides"),
)
OPEN = (
    "Explain how {} works.",
    "What should I know before I buy {}?",
    "Describe a day in the life of {}.",
    "Give me some advice on {}.",
    "What are the advantages and drawbacks of {}?",
)
OPEN_SUBJECTS = (
    ("a refrigerator", "a used car", "a bee", "learning to swim as an adult", "working at night"),
    ("a hash table", "a piano", "a nurse in a hospital", "writing a letter of thanks", "living without a car"),
    ("a vaccine", "a telescope", "a medieval baker", "keeping a garden in dry summers", "electing judges"),
    ("a sailing boat", "a laptop", "a river", "preparing for an interview", "testing software by hand"),
    ("a lock on a canal", "a bicycle for a child", "a taxi driver", "sleeping better", "high buildings"),
    ("a search engine", "a tent", "a lighthouse keeper", "reading a contract", "paying by card"),
    ("a sundial", "running shoes", "a violin maker", "cooking for many guests", "growing rice"),
    ("a compiler", "a house by the sea", "a judge", "speaking before an audience", "studying abroad"),
)
#: 122 tokens each with the template of Qwen2.5
SCRIPTS = (
    "Write a short bash script that counts the lines of all .py files below the current folder, and explain it in "
    "one sentence. Files in folders whose names begin with a dot do not count, nor do links. The script prints "
    "one line for each file, the number first, and the sum at the end. It must work with names that hold blanks. "
    "Where there is no such file it says so and exits with status 1. Use no other language.",
    "Write a bash script that renames every .jpeg file in a folder tree to .jpg. It must not overwrite files that "
    "are there already, must cope with blanks in names, and prints how many files it renamed. The folder is its "
    "first argument, the current one where none is given. With the option -n it only prints what it would do. "
    "Explain in one sentence how it finds the files. The script has to run on Linux and on macOS.",
    "Write a bash script that finds the ten largest files below a folder, which is its first argument, and prints "
    "their sizes in megabytes with one digit after the point, the largest first. Links are not followed, and "
    "folders that cannot be read are passed over without a message. If the argument is no folder, it prints an "
    "error to standard error and exits with status 2. Explain it in one sentence. Use no other language. Write "
    "comments in it.",
    "Write a bash script that reads a CSV file with the columns name, city and amount, and prints the sum of the "
    "amounts of each city, sorted by the sum, the largest first. The first line holds the names of the columns "
    "and is left out. Lines with another number of columns are counted, and their number is printed at the end. "
    "Use awk, and explain it in one sentence. Thanks. The script has to run on Linux and on macOS.",
    "Write a bash script that backs up a folder. It takes two arguments, the folder and where the archive goes; "
    "if one is missing it prints a usage line and exits with status 2. The archive is a compressed tar file with "
    "date and time in its name. Archives older than seven days are deleted, but never the newest one. Every step "
    "goes to a log file, and the script stops at the first error. Give the script, then explain it.",
)


def nth(forms: Sequence[str], subjects: Sequence[Sequence[str]], i: int) -> str:
    """The forms in turn, each time about another subject."""
    return forms[i % len(forms)].format(subjects[i // len(forms)][i % len(forms)])


class Written:
    """Answers to one message each, asked by token ids, that read all of it from the prefix cache, as a question that is
    asked again does: otherwise what other requests left there would decide how much of it is exact."""

    chat = False
    new: int
    stop = False  # whether the model's end of text ends the answer
    reads = True

    def __init__(self, tokens: Tokens):
        self.tokens = tokens

    def message(self, sample: int) -> str:
        raise NotImplementedError

    def question(self, sample: int) -> Question:
        ids = chat_ids(self.tokens, self.message(sample))

        def ask(engine: Engine, timeout: float) -> Reply:
            engine.remember(ids, timeout)
            reply = engine.write(ids, self.new, timeout, self.stop)
            return reply if self.reads else replace(reply, ids=(), logprobs=())

        return Question(ask, prompt=ids)


class Long(Written):
    name, samples, most, new = "long", 4, len(LONG) * len(LONG_SUBJECTS), LONG_TOKENS

    def message(self, sample: int) -> str:
        return nth(LONG, LONG_SUBJECTS, sample)

    def rows(self, answers: Sequence[Answer], readings: Sequence[Sequence[float]]) -> list[Row]:
        grams = [distinct(a.reply.ids) for a in answers]
        ended = [float(self.tokens.tokenizer.eos_token_id in a.reply.ids) for a in answers]
        return [
            *drift_rows(self.name, readings),
            average(self.name, "distinct 4-grams", grams, "share"),
            share(self.name, "went on after its end", ended),
        ]


class Script(Written):
    name, samples, most, new = "bash", len(SCRIPTS), len(SCRIPTS), SCRIPT_TOKENS
    stop = True  # after its end of text a model writes what nobody reads

    def message(self, sample: int) -> str:
        return SCRIPTS[sample]

    def rows(self, answers: Sequence[Answer], readings: Sequence[Sequence[float]]) -> list[Row]:
        own = [value for a in answers for value in a.reply.logprobs]
        return [extreme(self.name, "worst token, own", own, "log-prob", min), *token_rows(self.name, "", readings)]


class Length(Written):
    name, samples, most, new = "length", 20, len(OPEN) * len(OPEN_SUBJECTS), OPEN_TOKENS
    stop, reads = True, False

    def message(self, sample: int) -> str:
        return nth(OPEN, OPEN_SUBJECTS, sample)

    def rows(self, answers: Sequence[Answer], readings: Sequence[Sequence[float]]) -> list[Row]:
        sizes = [a.reply.completion_tokens for a in answers]
        return [
            average(self.name, "mean", sizes, "tokens"),
            average(self.name, "median", sizes, "tokens", np.median),
            share(self.name, "cut off", [float(a.reply.finish == "length") for a in answers]),
        ]
