"""Render a chat template as transformers does, in its sandbox, within limits on work, size and time.

A template is a program of whoever published the checkpoint. The sandbox of Jinja keeps it from Python; it does not keep it from
running for ever. A thread cannot be stopped from outside, so the limits are inside: loops, calls, filters, operators and output
are counted while they run, and what would grow is measured before it does.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from jinja2 import ext, nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from transformers.utils import chat_template_utils

from alignkd.models.encoders.templates.measure import TemplateLimitError, formatted, grown, operated, size

LONGEST_SOURCE = 1_000_000
"""Characters of a template."""
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Around what the template says an assistant generated, where that is asked for. Unicode non-characters: no text holds them."""

_WORK = 20_000_000
_WORK_PER_CHARACTER = 256
_LARGEST = 2_000_000
_LARGEST_PER_CHARACTER = 16
_SECONDS = 10.0
_PER_STEP, _PER_CALL, _STEPS_BETWEEN_TIMES = 20, 50, 256
_RANDOM = ("lipsum", "random")


@dataclass
class _Budget:
    """What one rendering may still do: ``work`` in characters made, ``largest`` value; ``marked``: generation blocks are."""

    work: int = _WORK
    largest: int = _LARGEST
    marked: bool = False
    end: float = field(default_factory=lambda: time.monotonic() + _SECONDS)
    steps: int = 0

    def charge(self, work: int) -> None:
        self.work -= work
        if self.work < 0:
            raise TemplateLimitError("it does more work than any chat template needs (a loop without end?)")
        self.steps += 1
        if self.steps % _STEPS_BETWEEN_TIMES == 0 and time.monotonic() > self.end:
            raise TemplateLimitError(f"it takes more than {_SECONDS:.0f} s")

    def charge_value(self, size: float) -> None:
        if size > self.largest:
            raise TemplateLimitError(f"it makes a value of more than {self.largest:,} characters")
        self.charge(int(size))


_BUDGET: ContextVar[_Budget | None] = ContextVar("budget", default=None)


def _budget() -> _Budget:
    """That of the rendering; while a template is compiled, constants of it are computed under one of their own."""
    return _BUDGET.get() or _Budget()


class GenerationBlocks(ext.Extension):
    """``{% generation %}``, in which templates put what an assistant generates."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block becomes a call of :meth:`_block` with its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Callable[[], str]) -> str:
        body = caller()
        return f"{OPEN}{body}{CLOSE}" if _budget().marked else body


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates: its settings, filters and globals, under a budget.

    ``clock`` formats the moment that ``strftime_now`` is asked for. What gives something else each time is left out.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, clock: Callable[[str], str]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, ext.loopcontrols], finalize=_counted_output
        )
        theirs = chat_template_utils._compile_jinja_template("").environment
        self.globals.update({name: value for name, value in theirs.globals.items() if name not in _RANDOM})
        self.globals.pop("lipsum", None)
        self.globals["strftime_now"] = clock
        self.filters = {
            name: _limited_filter(name, function) for name, function in theirs.filters.items() if name not in _RANDOM
        }
        self.filters |= {"_limited_loop": _limited_loop, "_limited_concat": _limited_concat}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_SOURCE:
            raise TemplateLimitError(f"it is {len(source):,} characters long, expected at most {LONGEST_SOURCE:,}")
        tree: Any = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            written = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
            loop.iter = _filter("_limited_loop", loop.iter, nodes.Const(_PER_STEP + written))
        limited: nodes.Template = _with_limited_concat(tree)
        return limited

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls; see :meth:`jinja2.sandbox.SandboxedEnvironment.call`."""
        budget = _budget()
        budget.charge(_PER_CALL)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            args = tuple(list(one) if isinstance(one, Iterator) else one for one in args)  # measured before it is joined
            budget.charge_value(grown(getattr(function, "__name__", ""), owner, args, kwargs))
        elif getattr(function, "__name__", "") in ("format", "format_map"):
            budget.charge_value(formatted(getattr(getattr(function, "__wrapped__", None), "__self__", ""), args, kwargs))
        made = super().call(context, function, *args, **kwargs)
        budget.charge_value(size(made, budget.largest))
        return made

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make its result larger than both of its sides."""
        budget = _budget()
        budget.charge_value(operated(operator, left, right, budget.largest))
        return super().call_binop(context, operator, left, right)


def render(template: Any, variables: dict[str, Any], *, given: int, marked: bool) -> str:
    """A compiled template with its variables, of which texts have ``given`` characters; ``marked``: with generation blocks.

    Raises:
        TemplateLimitError: it reached a limit.
        Exception: whatever the template raises.
    """
    budget = _Budget(_WORK + _WORK_PER_CHARACTER * given, _LARGEST + _LARGEST_PER_CHARACTER * given, marked)
    token = _BUDGET.set(budget)
    try:
        text: str = template.render(**variables)
        return text
    finally:
        _BUDGET.reset(token)


def _filter(name: str, value: Any, *args: nodes.Expr) -> Any:
    return nodes.Filter(value, name, list(args), [], None, None).set_lineno(value.lineno)


def _with_limited_concat(tree: Any) -> Any:
    """The tree with ``a ~ b`` as a filter over the list of both, since the operator itself cannot be intercepted."""
    for name, value in list(tree.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(tree, name, _with_limited_concat(value))
        elif isinstance(value, list):
            setattr(tree, name, [_with_limited_concat(v) if isinstance(v, nodes.Node) else v for v in value])
    if isinstance(tree, nodes.Concat):
        return _filter("_limited_concat", nodes.List(tree.nodes).set_lineno(tree.lineno))
    return tree


@pass_context
def _limited_loop(context: Context, items: Iterable[Any], cost: int) -> Iterator[Any]:
    del context
    budget = _budget()
    for item in items:
        budget.charge(cost)
        yield item


@pass_context
def _limited_concat(context: Context, parts: list[Any]) -> str:
    del context
    budget = _budget()
    budget.charge_value(sum(size(part, budget.largest) for part in parts))
    return "".join(map(str, parts))


def _counted_output(value: Any) -> Any:
    budget = _budget()
    budget.charge_value(size(value, budget.largest))
    return value


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = int(getattr(function, "jinja_pass_arg", None) is not None)

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        budget.charge(_PER_CALL)
        value = args[first] if len(args) > first else None
        if name == "join" and isinstance(value, Iterator):
            value = list(value)
            args = (*args[:first], value, *args[first + 1 :])
        budget.charge_value(grown(name, value, args[first + 1 :], kwargs))
        made = function(*args, **kwargs)
        if isinstance(made, str | list | tuple | dict):
            budget.charge_value(size(made, budget.largest))
        return made

    return limited
