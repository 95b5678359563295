"""docs/troubleshooting.md is one well-formed page, and the messages that it explains are those of the code."""

from __future__ import annotations

import ast
import errno
import os
import re
from itertools import pairwise
from pathlib import Path

import click
import pytest

from alignkd.cli import main

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
SECTIONS = ["Stage one", "Stage two", "Data and images", "Models and templates", "Caches and storage", "Command line"]
HEAD = ["| message | cause | fix |", "|---|---|---|"]
ROWS = [line for line in LINES if line.startswith("|") and line not in HEAD]
ELSEWHERE = ["No such option", *(os.strerror(number) for number in (errno.ENOSPC, errno.EACCES, errno.ENOTDIR))]
"""Messages of click and of the operating system, which users meet inside alignkd's own."""

RUN_OF_WORDS = 3
"""So many words in a row are taken as a message's own."""


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def is_of(code: str, message: str) -> bool:
    """Whether some words in a row of a message stand in the code; all of them, where it has few."""
    for piece in re.split(r"\.\.\.[:,/]?|\(id", message):
        words = piece.split()
        count = min(RUN_OF_WORDS, len(words))
        if count and any(" ".join(words[at : at + count]).strip(" :,;") in code for at in range(len(words) - count + 1)):
            return True
    return False


def words_of_code() -> str:
    """All texts of the product's modules; in an f-string a zero byte stands for what is filled in."""
    texts = []
    for path in (path for room in ("alignkd", "pipeline", "cache_store") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_page_has_its_sections_each_with_one_table_and_space_around_it():
    assert [line[3:] for line in LINES if line.startswith("## ")] == SECTIONS
    for number, line in enumerate(LINES):
        if line.startswith("## "):
            assert LINES[number - 1] == "", line
            assert LINES[number + 1 : number + 4] == ["", *HEAD], line
    for one, following in pairwise(LINES):
        assert not one.startswith("|") or following.startswith("|") or not following, one


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_message_cause_and_fix(row: str):
    assert len(cells(row)) == 3
    assert all(cells(row))


def test_no_message_stands_twice():
    messages = [cells(row)[0] for row in ROWS]
    assert len(set(messages)) == len(messages)


def test_every_message_is_one_of_the_code():
    code = words_of_code()
    messages = [quoted for row in ROWS for quoted in re.findall(r"`([^`]+)`", cells(row)[0])[:1]]
    unknown = [
        message
        for message in messages
        if " " in message and not is_of(code, message) and not any(part in message for part in ELSEWHERE)
    ]
    assert unknown == []


def test_every_option_and_command_in_the_page_exists():
    context = click.Context(main)
    known = {"--help"}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        inner = command.list_commands(context) if isinstance(command, click.Group) else []
        for one in [command, *(command.get_command(context, each) for each in inner)]:
            known |= {word for option in one.params for word in [*option.opts, *option.secondary_opts]}
    used = {word for row in ROWS for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", row)}
    assert used - known == set()
