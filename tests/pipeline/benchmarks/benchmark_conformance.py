"""What every benchmark promises. An entry is a file of its own: a class that inherits this one, and says what its files are.

``tests/data/benchmarks/NAME`` holds its official files, an answer file, and what the reference scorers make of that.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from alignkd.errors import AlignkdError, DataError
from alignkd.pipeline.evaluate.benchmarks.contract import PROTOCOLS
from alignkd.pipeline.evaluate.benchmarks.files import read_answers
from alignkd.pipeline.evaluate.benchmarks.registry import benchmark_class, open_benchmark
from alignkd.pipeline.evaluate.benchmarks.result import prediction_line, result_object

FIXTURES = Path(__file__).resolve().parents[2] / "data" / "benchmarks"
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite"
    " answers to the user's questions. USER: {} ASSISTANT:"
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def score_of(name, folder, answers, protocol="mobilevlm"):
    benchmark = open_benchmark(name, folder, protocol)
    return benchmark.score(benchmark.match(read_answers(answers)))


def close(found, expected):
    """Whether figures are equal to 1e-9, nested or not; further ones may be there."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(name in found and close(found[name], expected[name]) for name in expected)
    return found == pytest.approx(expected, abs=1e-9, rel=0)


def paths_in(value, before=()):
    """Where each value inside a JSON value stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield before
    for key, item in inner:
        yield from paths_in(item, (*before, key))


def replaced(value, path, new):
    """A JSON value with another value at a path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


class BenchmarkConformance:
    name: str
    official: tuple[str, ...]
    """Files without which there is no score."""
    question_files: tuple[str, ...] = ()
    """LLaVA's; questions are built from the official files without them."""
    reference = "llava"
    """Whose scores the protocol ``mobilevlm`` gives, in ``expected.json``."""
    not_metrics = frozenset({"printed"})
    """Names there that are no metrics of the answer file."""
    absent_pictures: tuple[str, ...] = ()
    not_prompted_alike: frozenset[int] = frozenset()
    """Indices of questions whose reference prompt is known to be damaged."""
    error_cases: dict = {}  # noqa: RUF012
    """For each case of ``expected.json``: what makes it, from (folder, answer lines) to answer lines; each is refused."""
    counted_cases: dict = {}  # noqa: RUF012
    """The same for cases that the reference averages over: what makes it, and what a note then says."""

    def readings(self, expected, protocol):
        """From ``expected.json``, one for each question: (what identifies it, fields of its reading)."""
        raise NotImplementedError

    def identity(self, reading):
        """What identifies the question of a reading, as :meth:`readings` has it."""
        return str(reading.question.question_id)

    def shuffle(self, folder):
        """Put the rows of the official files into another order, where that changes nothing."""
        raise NotImplementedError

    def add_fields(self, folder):
        """Add fields that nobody knows to the rows of the official files."""
        raise NotImplementedError

    def edit_question_file(self, path):
        """Change a question, so that the file is no longer about the official ones."""
        lines = lines_of(path)
        lines[0]["text"] = "Why?\n" + lines[0]["text"].split("\n", 1)[1]
        write_lines(path, lines)

    # Fixtures

    @pytest.fixture(scope="class")
    def expected(self):
        return json.loads((FIXTURES / self.name / "expected.json").read_text())

    @pytest.fixture
    def folder(self, tmp_path):
        """A copy that a test may change."""
        return Path(shutil.copytree(FIXTURES / self.name, tmp_path / self.name))

    @property
    def answers(self):
        return FIXTURES / self.name / "predictions.jsonl"

    def prompted(self, benchmark):
        """Questions with what the reference's loader made of them; it was not given those that nobody answers."""
        matched = benchmark.match(read_answers(self.answers))
        asked = [question for question, answer in zip(benchmark.questions, matched, strict=True) if answer is not None]
        return list(zip(asked, lines_of(FIXTURES / self.name / "prompts.jsonl"), strict=True))

    # What is asked

    def test_prompts_are_those_of_the_reference_loader(self):
        benchmark = open_benchmark(self.name, FIXTURES)
        for number, (question, line) in enumerate(self.prompted(benchmark)):
            assert question.question_id == line["question_id"]
            if number not in self.not_prompted_alike:
                assert PROMPT.format(question.turns[0][1]) == line["prompt"]
            assert [speaker for speaker, _ in question.turns] == ["human", "gpt"]
            assert bool(question.images) == line["image_fed"]
            assert line["generate"]["max_new_tokens"] == benchmark.max_new_tokens

    def test_recorded_prompts_are_those_of_the_reference_answer_file(self):
        benchmark = open_benchmark(self.name, FIXTURES)
        matched = benchmark.match(read_answers(self.answers))
        pairs = [(q.prompt, a.prompt) for q, a in zip(benchmark.questions, matched, strict=True) if a is not None]
        assert [own for own, _ in pairs] == [recorded for _, recorded in pairs]

    def test_the_image_treatment_is_what_the_reference_loader_hands_to_the_processor(self):
        benchmark = open_benchmark(self.name, FIXTURES)
        for question, line in self.prompted(benchmark):
            if not question.images or set(question.images) & set(self.absent_pictures):
                continue
            (reference,) = question.images
            assert benchmark.read_image(reference)
            if (FIXTURES / self.name / reference).is_file():
                with Image.open(FIXTURES / self.name / reference) as picture:
                    square = [max(picture.size)] * 2
                    mode = "RGB" if benchmark.image_treatment == "pad" else picture.mode
                    size = list(picture.size) if benchmark.image_treatment == "crop" else square
                assert line["image_given_to_processor"] == {"mode": mode, "size": size}

    def test_without_llavas_question_file_the_same_is_asked(self, folder):
        asked = {protocol: open_benchmark(self.name, folder, protocol).questions for protocol in PROTOCOLS}
        for name in self.question_files:
            (folder / name).unlink()
        for protocol in PROTOCOLS:
            assert open_benchmark(self.name, folder, protocol).questions == asked[protocol]

    def test_a_question_file_about_other_questions_is_refused(self, folder):
        for name in self.question_files:
            whole = (folder / name).read_bytes()
            self.edit_question_file(folder / name)
            with pytest.raises(DataError, match=re.escape(name)):
                open_benchmark(self.name, folder)
            (folder / name).write_bytes(b"")
            with pytest.raises(DataError, match=re.escape(name)):
                open_benchmark(self.name, folder)
            (folder / name).write_bytes(whole)

    # What answers are worth

    def test_the_score_is_the_figure_that_papers_print(self, expected):
        score = score_of(self.name, FIXTURES, self.answers)
        assert score.score == pytest.approx(expected["paper_figure"]["value"], abs=1e-9, rel=0)

    def test_metrics_are_those_of_the_reference_scorer(self, expected):
        scores = expected["references"][self.reference]["scores"]
        wanted = {name: value for name, value in scores.items() if name not in self.not_metrics}
        assert wanted
        found = score_of(self.name, FIXTURES, self.answers).metrics
        assert close(found, wanted), (found, wanted)

    def test_metrics_under_lmms_eval_are_those_of_its_own_functions(self, expected):
        scores = expected["references"]["lmms_eval"]["scores"]
        found = score_of(self.name, FIXTURES, self.answers, "lmms-eval").metrics
        assert close(found, scores), (found, scores)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_every_answer_is_read_as_the_reference_reads_it(self, expected, protocol):
        score = score_of(self.name, FIXTURES, self.answers, protocol)
        found = {self.identity(reading): reading for reading in score.readings}
        assert len(found) == len(score.readings)
        wanted = dict(self.readings(expected, protocol))
        assert set(found) == set(wanted)
        for identity, fields in wanted.items():
            for name, value in fields.items():
                given = getattr(found[identity], name)
                assert given == (pytest.approx(value) if isinstance(value, float) else value), (identity, name)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_scores_of_readings_lie_between_0_and_1_and_results_are_json(self, protocol):
        benchmark = open_benchmark(self.name, FIXTURES, protocol)
        score = benchmark.score(benchmark.match(read_answers(self.answers)))
        assert [reading.question for reading in score.readings] == list(benchmark.questions)
        assert all(0 <= reading.score <= 1 for reading in score.readings)
        result = result_object(benchmark, score)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        for reading in score.readings:
            line = prediction_line(reading)
            assert json.loads(json.dumps(line)) == line

    def test_the_order_of_official_rows_changes_nothing(self, folder):
        before = score_of(self.name, folder, self.answers)
        self.shuffle(folder)
        after = score_of(self.name, folder, self.answers)
        assert close(after.metrics, dict(before.metrics))
        assert {self.identity(r): (r.parsed, r.score) for r in after.readings} == {
            self.identity(r): (r.parsed, r.score) for r in before.readings
        }

    def test_unknown_fields_of_official_rows_change_nothing(self, folder):
        before = score_of(self.name, folder, self.answers)
        self.add_fields(folder)
        after = score_of(self.name, folder, self.answers)
        assert (after.metrics, after.readings) == (before.metrics, before.readings)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_some_of_the_units_are_read_as_among_all(self, protocol):
        benchmark = open_benchmark(self.name, FIXTURES, protocol)
        matched = benchmark.match(read_answers(self.answers))
        units = benchmark.units()
        assert sorted(index for unit in units for index in unit) == list(range(len(benchmark.questions)))
        kept = sorted(index for unit in units[::2] for index in unit)
        some = benchmark.only(kept)
        assert some.questions == tuple(benchmark.questions[index] for index in kept)
        everything = benchmark.score(matched)
        part = some.score([matched[index] for index in kept])
        assert part.readings == tuple(everything.readings[index] for index in kept)
        assert len(benchmark.questions) > len(some.questions)

    # What is refused

    def test_missing_files_are_all_named_with_their_source_and_licence(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError) as refused:
            open_benchmark(self.name, tmp_path / "empty")
        about = benchmark_class(self.name).about
        for word in (*self.official, about.source, about.licence):
            assert word in str(refused.value)

    def test_each_official_file_is_needed(self, folder):
        for name in self.official:
            moved = (folder / name).rename(folder.parent / "moved")
            with pytest.raises(DataError, match=re.escape(name)):
                open_benchmark(self.name, folder)
            moved.rename(folder / name)

    def test_the_folder_of_another_benchmark_is_refused(self):
        for other in sorted(FIXTURES.iterdir()):
            if other.is_dir() and other.name != self.name:
                with pytest.raises(DataError, match=re.escape(benchmark_class(self.name).about.title)):
                    open_benchmark(self.name, other)

    def test_answers_to_other_questions_are_refused(self, folder):
        lines = lines_of(self.answers)
        for line in lines:
            line["question_id"] = f"other-{line['question_id']}"
        with pytest.raises(DataError):
            score_of(self.name, folder, write_lines(folder / "a.jsonl", lines))

    def test_every_error_case_of_the_reference_is_refused_or_counted(self, folder, expected):
        known = {case["case"] for case in expected.get("error_cases", [])}
        assert known <= set(self.error_cases) | set(self.counted_cases)
        for case, make in self.error_cases.items():
            case_folder = Path(shutil.copytree(folder, folder.parent / "case"))
            answers = write_lines(folder.parent / "a.jsonl", make(case_folder, lines_of(self.answers)))
            with pytest.raises(DataError):
                pytest.fail(f"{case}: scored {score_of(self.name, case_folder, answers).score}")
            shutil.rmtree(case_folder)
        for case, (make, words) in self.counted_cases.items():
            case_folder = Path(shutil.copytree(folder, folder.parent / "case"))
            answers = write_lines(folder.parent / "a.jsonl", make(case_folder, lines_of(self.answers)))
            notes = " ".join(score_of(self.name, case_folder, answers).notes)
            assert words in notes, (case, notes)
            shutil.rmtree(case_folder)

    def test_damaged_official_files_are_refused_by_name(self, folder):
        for name in self.official:
            if not (folder / name).is_file():
                continue
            whole = (folder / name).read_bytes()
            for damaged in (b"", b"\xff\xfe\x00", whole[: len(whole) // 2], b"[]", b"{}", b"null", b"[" * 100_000):
                (folder / name).write_bytes(damaged)
                with pytest.raises(DataError, match=re.escape(name)):
                    open_benchmark(self.name, folder)
            (folder / name).write_bytes(whole)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_no_value_of_a_wrong_type_is_met_with_a_traceback(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("fuzz") / self.name
        shutil.copytree(FIXTURES / self.name, folder)
        files = [name for name in (*self.official, *self.question_files, "predictions.jsonl") if (folder / name).is_file()]
        path = folder / data.draw(st.sampled_from(files))
        is_lines = path.suffix == ".jsonl" or self.is_json_lines(path.name)
        if path.suffix in (".json", ".jsonl"):
            value = lines_of(path) if is_lines else json.loads(path.read_text())
            where = data.draw(st.sampled_from(list(paths_in(value))[1 if is_lines else 0 :]))
            value = replaced(value, where, data.draw(JSON_VALUES))
            text = "".join(json.dumps(line) + "\n" for line in value) if is_lines else json.dumps(value)
        else:
            text = path.read_text()
            start, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 30))
            text = text[:start] + data.draw(st.text(max_size=10)) + text[start + length :]
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        for protocol in PROTOCOLS:
            with contextlib.suppress(AlignkdError):
                score = score_of(self.name, folder, folder / "predictions.jsonl", protocol)
                json.dumps([prediction_line(reading) for reading in score.readings])
        shutil.rmtree(folder)

    def is_json_lines(self, name):
        """Whether a file holds JSON lines, whatever its suffix."""
        return False

    # Pictures

    def test_pictures_are_found_and_read_inside_the_folder_alone(self, folder):
        benchmark = open_benchmark(self.name, folder)
        assert benchmark.missing_images() == list(self.absent_pictures)
        with pytest.raises(DataError):
            benchmark.read_image("../../outside.jpg")
