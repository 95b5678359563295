"""The Triton kernels: in Triton's interpreter they equal the PyTorch passes; and they compile for a GPU that is not there.

The interpreter must be chosen before Triton is imported, so these tests run once more in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from answer_cases import SETTINGS, assert_near, make_case

from alignkd.losses.answer_loss import fused, rows
from alignkd.losses.answer_loss.rows import DenseTeacher, Labels, Softmax

triton = pytest.importorskip("triton", reason="Triton exists on Linux alone")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_kernels_equal_the_pytorch_passes")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

ALL = {"reverse_kl": 1.0, "supervised": 0.5, "forward_kl": 0.7, "jensen_shannon": 2.0}


@pytest.mark.slow
@compiled
def test_the_kernels_equal_the_pytorch_passes():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@compiled
def test_the_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from alignkd.losses.answer_loss import triton_kernel as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = {"N", "stride", "teacher_stride"}
    fractions = {"temperature", "temperature_1", "temperature_2", "label_weight"}
    fractions |= {f"{name}_weight" for name in ("reverse", "forward", "jensen")}
    logits = {"logits", "teacher_logits"}
    flags = {
        "REVERSE": 2,
        "FORWARD": 2,
        "JENSEN": 1,
        "GRADIENT": True,
        "SUPERVISED": True,
        "PARTS": 2,
        "LABELS": True,
        "BLOCK": 4096,
    }
    for kernel in (kernels._normaliser_kernel, kernels._mix_kernel, kernels._compare_kernel):
        chosen = {name: flags[name] for name in kernel.arg_names if name in flags}
        types = {
            name: "constexpr" if name in chosen else "i32" if name in numbers else "fp32" if name in fractions
            else "*bf16" if name in logits else "*i64" if name == "label_ids" else "*fp32"
            for name in kernel.arg_names
        }  # fmt: skip
        source = ASTSource(fn=kernel, signature=types, constexprs=chosen)
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert len(found.asm["cubin"]) > 0


@pytest.fixture
def kernels():
    from alignkd.losses.answer_loss import triton_kernel

    return triton_kernel


def run(backend, monkeypatch, case, weights, temperature):
    monkeypatch.setattr(fused, "rows_for", lambda logits: backend)
    leaves = case.leaves()
    found = case.fused(leaves, weights, temperature)
    found.loss.backward()
    return found, [leaf.grad for leaf in leaves]


@interpreted
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(
    "weights", [{"supervised": 1.0}, {"reverse_kl": 1.0, "supervised": 0.0}, ALL], ids=["sft", "kl", "all"]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_the_pytorch_passes(kernels, monkeypatch, kind, weights, temperature, dtype):
    case = make_case(SETTINGS[kind], answers=5, dtype=dtype)
    found, gradients = run(kernels, monkeypatch, case, weights, temperature)
    expected, reference = run(rows, monkeypatch, case, weights, temperature)
    assert_near(found.loss, expected.loss, 1e-5)
    for name in weights:
        assert_near(found.sums[name], expected.sums[name], 1e-5)
    # The interpreter rounds to bfloat16 in its own way.
    for one, other in zip(gradients, reference, strict=True):
        assert (one - other).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * other.norm()


@interpreted
def test_rows_longer_than_a_block_are_walked_to_the_end(kernels):
    """5,003 columns: a block of 4,096 and a rest that ends within a block."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(2, 5003, generator=generator) for _ in range(2))
    labels = Labels(torch.tensor([5002, 7]), 0.5)
    found = []
    for backend in (kernels, rows):
        student, of_teacher = backend.normaliser(logits, 2.0), backend.normaliser(teacher, 2.0)
        part = Softmax(torch.tensor([0.5, -1.5]), student, 2.0)
        mixed, compared = logits.clone(), logits.clone()
        backend.mix_(mixed, [part], labels)
        sides = DenseTeacher(teacher, of_teacher)
        losses = backend.compare_(compared, sides, part, {"jensen_shannon": 1.0, "reverse_kl": 0.3}, (part, labels), True)
        found.append([student.top_C, student.log_C, mixed, compared, losses])
    for one, other in zip(*found, strict=True):
        assert_near(one, other, 1e-6)


@interpreted
def test_rows_that_are_impossible_throughout_or_not_a_number_are_known_as_such(kernels):
    logits = torch.zeros(3, 9)
    logits[0], logits[1, 4] = -torch.inf, torch.nan
    found, expected = kernels.normaliser(logits, 1.0), rows.normaliser(logits, 1.0)
    assert found.top_C[0] == expected.top_C[0] == 0
    assert found.log_C[0] == expected.log_C[0] == -torch.inf
    assert (found.top_C + found.log_C)[1].isnan()
    assert (expected.top_C + expected.log_C)[1].isnan()


@interpreted
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_impossible_tokens_count_as_in_the_pytorch_passes(kernels, name):
    """For both, for the teacher alone, and for the student alone."""
    logits, teacher = torch.randn(3, 11), torch.randn(3, 11)
    logits[0, 2], teacher[0, 2], teacher[1, 2], logits[2, 2] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    found = []
    for backend in (kernels, rows):
        part = Softmax(torch.ones(3), backend.normaliser(logits, 1.0), 1.0)
        sides = DenseTeacher(teacher, backend.normaliser(teacher, 1.0))
        found.append(backend.compare_(logits.clone(), sides, part, {name: 1.0}, None, False))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@interpreted
def test_what_the_teacher_says_nothing_about_is_not_taken_for_agreement(kernels):
    logits, teacher = torch.randn(1, 11), torch.full((1, 11), torch.nan)
    for backend in (kernels, rows):
        part = Softmax(torch.ones(1), backend.normaliser(logits, 1.0), 1.0)
        sides = DenseTeacher(teacher, backend.normaliser(teacher, 1.0))
        weights = {"reverse_kl": 1.0, "forward_kl": 1.0, "jensen_shannon": 1.0}
        assert backend.compare_(logits.clone(), sides, part, weights, None, False).isnan().all()
