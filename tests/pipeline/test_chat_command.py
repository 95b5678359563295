"""``alignkd chat`` through the real entry point: options, pipes, a terminal, and what is refused."""

from __future__ import annotations

import json
import os
import pty
import select
from pathlib import Path

import pytest
from tiny_runs import IMAGES, STUDENT, TEACHER, wait_until

PICTURE = IMAGES / "0.png"
SHORT = ["--device", "cpu", "--max-new-tokens", 5]
ENDLESS = """
from alignkd.models.families.mobilevlm import MobileVlmFamily

MobileVlmFamily.end_token_ids = property(lambda self: [-1])
"""


def chat(door, *words, model=STUDENT, **given):
    return door("chat", model, *SHORT, *words, **given)


def answers(done):
    assert done.code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_questions_of_options_and_of_a_pipe_are_one_conversation_with_the_same_answers(door, tmp_path):
    questions = ["What is it?", "Which colour does it have?"]
    options = [word for question in questions for word in ("--prompt", question)]
    given = answers(chat(door, "--image", PICTURE, *options, "--json"))
    assert [line["question"] for line in given] == questions
    assert all(set(line) == {"question", "answer", "tokens", "seconds"} and line["tokens"] == 5 for line in given)
    pipe = tmp_path / "questions.txt"
    pipe.write_text("\n".join(questions))
    assert [line["answer"] for line in answers(chat(door, "--image", PICTURE, "--json", stdin=pipe))] == [
        line["answer"] for line in given
    ]
    pipe.write_text(f"{questions[0]}\n/new\n{questions[1]}\n")
    anew = answers(chat(door, "--image", PICTURE, "--json", stdin=pipe))
    assert anew[0]["answer"] == given[0]["answer"]
    alone = answers(chat(door, "--image", PICTURE, "--prompt", questions[1], "--json"))
    assert anew[1]["answer"] == alone[0]["answer"]


def test_answers_alone_go_to_standard_output_with_hidden_characters_escaped(door, tmp_path):
    plugin = tmp_path / "says.py"
    plugin.write_text(
        "from alignkd.models.families.mobilevlm import MobileVlmFamily\n"
        "MobileVlmFamily.answer_text = lambda self, ids: 'a\\x1b[2Jb c\\n\\td\\u202e'\n"
    )
    done = chat(door, "--image", PICTURE, "--prompt", "Why?", "--plugin", plugin)
    assert done.code == 0, done.stderr
    assert done.stdout == "a\\x1b[2Jb c\n\td\\u202e\n"
    assert done.stderr.startswith("(cut off after 5 tokens")


def test_an_empty_answer_is_said(door, tmp_path):
    plugin = tmp_path / "silent.py"
    plugin.write_text(ENDLESS.replace("end_token_ids = property(lambda self: [-1])", "answer_text = lambda self, ids: ''"))
    done = chat(door, "--prompt", "Why?", "--plugin", plugin)
    assert (done.code, done.stdout) == (0, "\n")
    assert done.stderr == "(the model ended its answer at once: it is empty)\n"


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_conversation_may_have_no_picture_or_several(door, pictures):
    images = [word for number in range(pictures) for word in ("--image", IMAGES / f"{number}.png")]
    (line,) = answers(chat(door, *images, "--prompt", "What is two and two?", "--json", model=TEACHER))
    assert line["tokens"] == 5


def test_sampled_answers_are_those_of_the_seed(door):
    words = ["--image", PICTURE, "--prompt", "Why?", "--temperature", 1.5, "--top-p", 0.9, "--json"]
    first, again, other = (answers(chat(door, *words, "--seed", seed))[0]["answer"] for seed in (3, 3, 4))
    assert first == again != other


def test_bad_input_is_one_message_and_exit_code_2(door, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("Why?\n\nWhat?\n")
    folder = tmp_path / "folder"
    (folder / "run" / "student").mkdir(parents=True)
    ask = ["--prompt", "Why?"]
    cases = [
        (["--image", tmp_path / "none.png", *ask], {}, "none.png: No such file"),
        (["--image", bad, *ask], {}, "not a readable image"),
        (["--image", folder, *ask], {}, "is a folder; give the file of a picture"),
        (["--prompt", ""], {}, "the question is empty"),
        (["--prompt", "<image>?", "--image", PICTURE, "--prompt", "<image>"], {}, "names 2 pictures"),
        (ask, {"model": folder}, "holds no config.json; give the folder"),
        (ask, {"model": folder / "run"}, f"holds no config.json; a run's student is {folder / 'run' / 'student'}"),
        (ask, {"model": PICTURE}, "is not a folder"),
        ([], {}, "standard input holds no question"),
        ([], {"stdin": bad}, "the question is not UTF-8, from its character 4"),
        ([], {"stdin": tmp_path / "empty.txt"}, "the question is empty"),
        ([*ask, "--max-length", 20], {}, "20 are the most"),
        ([*ask, "--template", "plain"], {}, "--template plain"),
    ]
    for words, given, message in cases:
        done = chat(door, *words, **given)
        assert done.code == 2, (words, done.stderr)
        assert message in done.stderr
        lines = [line for line in done.stderr.splitlines() if not line.startswith("(cut off")]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("Error: ")


class Terminal:
    """A pseudo terminal: what a user types, and all that was shown."""

    def __init__(self):
        self.mine, theirs = pty.openpty()
        self.name, self.shown = os.ttyname(theirs), ""
        os.set_blocking(self.mine, False)
        self._theirs = theirs  # kept open, so that reading does not fail before the command has opened it

    def type(self, text):
        os.write(self.mine, text.encode())

    def read(self):
        while select.select([self.mine], [], [], 0.05)[0]:
            self.shown += os.read(self.mine, 65_536).decode(errors="replace").replace("\r", "")
        return self.shown

    def until(self, words, times=1):
        wait_until(lambda: self.read().count(words) >= times)

    def close(self):
        os.close(self.mine)
        os.close(self._theirs)


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_at_a_terminal_bad_questions_and_stopped_answers_do_not_end_the_session(door, terminal, tmp_path, kind):
    plugin = tmp_path / "endless.py"
    plugin.write_text(ENDLESS)
    words = ["chat", STUDENT, "--image", PICTURE, "--device", "cpu", "--plugin", plugin, "--max-new-tokens", 1900]
    running = door.start(*words, "--temperature", 1.0, terminal=terminal.name, TERM=kind)
    terminal.until("Ctrl-C stops an answer")
    terminal.until("> ")
    terminal.type("an <image> too many <image>\n")
    terminal.until("leave <image> out of the question")
    terminal.until("> ", 2)
    before = len(terminal.shown)
    terminal.type("Why?\n")
    wait_until(lambda: len(terminal.read()) > before + 20)
    terminal.type("\x03")
    terminal.until("(stopped)")
    terminal.until("> ", 3)
    terminal.type("/new\n")
    terminal.until("(another conversation begins)")
    terminal.until("> ", 4)
    terminal.type("\n")
    assert running.finish().code == 0
    assert "Traceback" not in terminal.shown


@pytest.mark.parametrize("key", ["\x04", "\x03"])
def test_the_end_of_input_and_an_interrupt_at_the_prompt_end_the_session(door, terminal, key):
    running = door.start("chat", STUDENT, *SHORT, terminal=terminal.name, TERM="dumb")
    terminal.until("> ")
    terminal.type("What is it?\n")
    terminal.until("(cut off after 5 tokens")
    terminal.until("> ", 2)
    terminal.type(key)
    assert running.finish().code == 0
    assert "Traceback" not in terminal.shown


def test_at_a_terminal_standard_output_in_a_file_has_answers_alone(door, terminal):
    running = door.start("chat", STUDENT, *SHORT, "--json", stdin=terminal.name)
    terminal.type("What is it?\n\n")
    done = running.finish()
    (line,) = answers(done)
    assert line["question"] == "What is it?"
    assert done.stderr.count("> ") == 2
    assert Path(running.stdout).read_text().count("\n") == 1
