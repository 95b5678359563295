"""``alignkd answer``: a model's answers to the questions of a data file, as data in the same format.

Each of several processes answers a share of the questions without waiting for the others; the one that completes them writes
the file. A run that is interrupted continues with what has no answer yet, in any number of processes.
"""

import json
import logging
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError
from alignkd.inputs.prompts import check_template
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.answer import identity
from alignkd.pipeline.answer.answering import Answering
from alignkd.pipeline.answer.images import ImageReferences
from alignkd.pipeline.answer.output import write_answers
from alignkd.pipeline.answer.parts import AnswerParts, answer_writer
from alignkd.pipeline.answer.work import MOST_OF_FEATURES, MOST_OF_PIXELS, Work
from alignkd.pipeline.config.answer import AnswerConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.open_samples import check_images, open_samples
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.rejected_samples import RejectedSamples
from alignkd.pipeline.evaluate.running.hold import holding
from alignkd.pipeline.evaluate.running.identity import stored
from alignkd.pipeline.evaluate.running.part_lines import AGAIN, part_files
from alignkd.pipeline.evaluate.running.parts import put_text
from alignkd.pipeline.evaluate.running.questions import Questions
from alignkd.pipeline.hub.models import model_folder, pin_models, tower_folder
from alignkd.pipeline.runtime.devices import device_words, parse_dtype, pick_device
from alignkd.pipeline.runtime.files import check_out_folder
from alignkd.pipeline.runtime.logs import log_start
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.ranks import Worker, find_worker
from alignkd.pipeline.runtime.run_record import write_run_record
from alignkd.pipeline.runtime.signals import StopFlag, stop_on_signals
from alignkd.plain_files import read_plain
from alignkd.plugins import load_plugins

RESULT = "result.json"
_LARGEST = 64 * 2**20
_log = logging.getLogger(__name__)


def answer(config: AnswerConfig) -> dict[str, Any]:
    """Answer all questions, and write the data file ``config.out``; returns the figures of the run.

    Every process of a job calls it. ``complete`` is True for the one that wrote the file, and for one that finds it written
    by the same command; the others get ``left``, the number of answers that other processes still write.

    Raises:
        AlignkdError: bad input, too many rejected samples, or a file of another run in the place of ``out``.
        Interrupted: a signal came; the same command continues.
    """
    load_plugins(config.plugins)
    worker, folder = find_worker(), run_folder(config.out)
    check_out_folder(folder)
    check_images(config)
    _check_out(Path(config.out), folder)
    config = pin_models(config)
    with stop_on_signals() as stop:
        samples = open_samples(config)
        with holding(folder, worker, stop.check):
            return _Run(config, samples, worker, stop).result()


def run_folder(out: str | Path) -> Path:
    """The folder beside a data file that has the record of its run and, until it is complete, its parts."""
    return Path(f"{out}.run")


def _check_out(out: Path, folder: Path) -> None:
    if out.exists() and not (folder / "settings.json").exists():
        what = "is a folder" if out.is_dir() else "exists, and alignkd answer did not write it"
        raise ConfigError(f"--out {out} {what}: choose another --out, or remove it")


class _Run:
    """One process of a run, its model loaded."""

    def __init__(self, config: AnswerConfig, samples: Samples, worker: Worker, stop: StopFlag) -> None:
        self.config, self.samples, self.worker, self.stop = config, samples, worker, stop
        self.folder = run_folder(config.out)
        device = pick_device(config.device, worker.local_rank)
        tower, folder = tower_folder(config.vision_tower), model_folder(config.model)
        self.vlm: Vlm = load_vlm(folder, dtype=parse_dtype(config.dtype), device=device, vision_tower=tower)
        template = config.template or self.vlm.default_template
        check_template(template, self.vlm.templates)
        self.preparer = Preparer.of(
            self.vlm,
            template=template,
            max_length=DEFAULT_MAX_LENGTH,
            with_spans=False,
            # A template that writes a date writes the same one when the run is continued.
            prompt_date=config.prompt_date or stored(self.folder).get("prompt_date") or datetime.now(UTC).date().isoformat(),
        )
        self.template, self.prompt_date = template, self.preparer.encoder.prompt_date
        self.identity = identity.of_run(config, self.vlm, samples, template, self.prompt_date)
        self.work = Work(samples, config.n, MOST_OF_FEATURES if self.vlm.caches_tower else MOST_OF_PIXELS)

    def result(self) -> dict[str, Any]:
        """The figures of the file, once it is written."""
        identity.claim(self.folder, self.identity, self.config.out)
        if (found := self._finished()) is not None:
            _log.info("answer: %s is complete already", self.config.out)
            return found
        if self.worker.rank == 0:
            with explained_write_faults(self.folder, "run.json", again=AGAIN):
                write_run_record(self.folder / "run.json", "answer", asdict(self.config))
        log_start(
            "answer",
            rank=self.worker,
            device=device_words(str(self.vlm.device)),
            model=self.config.model,
            data=f"{self.config.data_words} ({len(self.samples):,} samples)",
            images=self.config.images_words,
            plan=f"{len(self.work.order) * self.config.n:,} answers of up to {self.config.max_new_tokens:,} tokens, temperature"
            f" {self.config.temperature:g}",
            out=self.config.out,
            template=self.template,
        )
        self.references = ImageReferences(self.config, self.samples)
        self._answer_share()
        return self._written()

    def _answer_share(self) -> None:
        """The answers of this process that are not there yet."""
        answering = Answering(self.vlm, self.preparer, self.config)
        rejects = RejectedSamples(self.config.max_rejected, len(self.work.order))
        with AnswerParts(self.folder, self.samples, self.config.n) as there:
            windows = list(self.work.share_of(self.worker))
            pending = [window for window in windows if not all(map(there.is_answered, window))]
            total, left = (sum(map(len, some)) for some in (windows, pending))
            if total > left:
                _log.info("answer: %d of the %d samples of this process are answered already", total - left, total)
            with (
                answer_writer(self.folder, self.worker) as write,
                progress_bar("answer", total, "samples", done=total - left) as progress,
            ):
                self.stop.check()
                for questions, refused in Questions(self.vlm, self.samples, self.preparer).windows(pending):
                    write.rejected(refused)
                    for one in refused:
                        rejects.add(one.sample.id or one.sample.key, one.reason)
                    for batch in answering.batches(questions):
                        if not there.has_all(batch):
                            write.answers(answering(batch))
                        progress.advance(len(batch) / self.config.n)
                        self.stop.check()
                    progress.advance(len(refused))

    def _written(self) -> dict[str, Any]:
        """The figures, where this process finds all answers and writes the file."""
        if (found := self._finished()) is not None:  # another process was faster
            return found
        with AnswerParts(self.folder, self.samples, self.config.n) as parts:
            known = self.work.order.tolist()
            left = sum(not parts.is_answered(index) and index not in parts.rejected for index in known)
            if left:
                _log.info("answer: this process is done; %d samples are left to others", left)
                return {"out": self.config.out, "complete": False, "left": left}
            figures = write_answers(self.config, self.samples, self.work, parts, self._provenance(), self.references)
        found = {
            "out": self.config.out,
            "complete": True,
            "model": self.config.model,
            "weights_sha256": self.identity["weights_sha256"],
            "samples": len(self.samples),
            **figures,
            "keep_cut": self.config.keep_cut,
        }
        put_text(self.folder / RESULT, json.dumps(found, indent=2) + "\n")
        for path in part_files(self.folder):
            with suppress(FileNotFoundError):  # another process that found all answers has removed it
                path.unlink()
        return found

    def _finished(self) -> dict[str, Any] | None:
        """The figures of the file, if it is complete already.

        Raises:
            ConfigError: it is, with cut answers and not without, or the other way round.
        """
        try:
            found = json.loads(read_plain(self.folder / RESULT, _LARGEST))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not Path(self.config.out).is_file():
            return None
        if found.get("keep_cut") != self.config.keep_cut:
            raise ConfigError(
                f"--out {self.config.out} is complete, and was written with{'' if found.get('keep_cut') else 'out'} --keep-cut:"
                f" choose another --out, or remove it and {self.folder}"
            )
        return found

    def _provenance(self) -> dict[str, Any]:
        """What each record says of its answer."""
        names = ("max_new_tokens", "temperature", "dtype", *(("top_p", "seed") if self.config.temperature else ()))
        settings = {name: getattr(self.config, name) for name in names} | {"template": self.template}
        settings |= {"prompt_date": self.prompt_date} if self.prompt_date else {}
        name = Path(self.config.model).name or self.config.model
        return {"model": name, "weights": self.identity["weights_sha256"], "settings": settings}
