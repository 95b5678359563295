"""A session of ``alignkd chat``: where questions come from, and where answers and notes go."""

import io
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from alignkd.errors import AlignkdError, TransientError
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.chat import ChatConfig
from alignkd.pipeline.evaluate.chat.conversation import ANEW, Answered, Conversation, check_pictures
from alignkd.pipeline.evaluate.chat.questions import checked, piped, typed
from alignkd.pipeline.evaluate.decoding import Decoding
from alignkd.pipeline.hub.models import model_folder, pin_models, tower_folder
from alignkd.pipeline.runtime.devices import device_words, parse_dtype, pick_device
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory
from alignkd.plugins import load_plugins


@dataclass(frozen=True)
class Screen:
    """Where a session writes: ``piece`` of an answer as it comes, a whole answer when it ends, and notes beside them."""

    piece: Callable[[str], None]
    answered: Callable[[Answered], None]
    note: Callable[[str], None]


def chat(config: ChatConfig, screen: Screen) -> None:
    """Answer the questions of the options, of a terminal or of a pipe, all in one conversation.

    Raises:
        AlignkdError: bad input; at a terminal, only what comes before the first question.
    """
    prompts = checked(config.prompt)
    check_pictures(config.image)
    load_plugins(config.plugins)
    at_terminal = not config.prompt and sys.stdin is not None and sys.stdin.isatty()
    conversation = open_conversation(config)
    if at_terminal:
        screen.note(_welcome(config, conversation))
    questions = prompts if config.prompt else _from_standard_input(at_terminal)
    for question in questions:
        if question.strip() == ANEW:
            conversation.begin_anew()
            screen.note("(another conversation begins)")
            continue
        try:
            _answer(conversation, question, screen, may_stop=at_terminal)
        except AlignkdError as error:
            if not at_terminal:
                raise
            screen.note(f"Error: {error}")


def open_conversation(config: ChatConfig) -> Conversation:
    """Load the model, and read the pictures.

    Raises:
        AlignkdError: the folder is no checkpoint, or a picture cannot be read.
    """
    config = pin_models(config)
    vlm = load_vlm(
        model_folder(config.model),
        dtype=parse_dtype(config.dtype),
        device=pick_device(config.device),
        vision_tower=tower_folder(config.vision_tower),
    )
    torch.manual_seed(config.seed)
    return Conversation.about(
        vlm,
        config.image,
        Decoding(config.max_new_tokens, config.temperature, config.top_p),
        template=config.template or vlm.default_template,
        max_length=config.max_length,
        prompt_date=config.prompt_date,
        system=config.system or "",
    )


def _answer(conversation: Conversation, question: str, screen: Screen, *, may_stop: bool) -> None:
    try:
        answered = conversation.ask(question, screen.piece, may_stop=may_stop)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TransientError(
            f"memory ran out ({' '.join(str(error).split())[:200]}). Ask a shorter question, show fewer pictures, or use"
            " --dtype bfloat16 or another --device"
        ) from error
    screen.answered(answered)
    if answered.stopped:
        screen.note("(stopped)")
    elif not answered.answer:
        screen.note("(the model ended its answer at once: it is empty)")
    elif answered.cut:
        screen.note(f"(cut off after {answered.tokens:,} tokens: --max-new-tokens and --max-length say how many there may be)")


def _from_standard_input(at_terminal: bool) -> Iterable[str]:
    if sys.stdin is None:
        return piped(io.StringIO())
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is not UTF-8 is refused with its question
    return typed(edited=sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb") if at_terminal else piped(sys.stdin)


def _welcome(config: ChatConfig, conversation: Conversation) -> str:
    vlm, pictures = conversation.vlm, ", ".join(config.image) or "no picture"
    return (
        f"{config.model} ({vlm.family}, template {conversation.preparer.encoder.template}) on {device_words(str(vlm.device))};"
        f" {pictures}\nOne question a line. An empty line or Ctrl-D ends, Ctrl-C stops an answer, {ANEW} begins another"
        " conversation."
    )
