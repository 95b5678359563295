"""Positions that stage two computes for every real one, with and without batches of like length, on a mix like LLaVA's.

45 % short answers, 30 % conversations, 18 % descriptions, 7 % long texts, each log-normal, with 144 vision tokens. With several
processes, each of which waits for the slowest at every micro-batch, waiting counts as computing.

Example: python benchmarks/padding.py --samples 100000
"""

import argparse
import time

import numpy as np

from alignkd.pipeline.feeding.order import WINDOW_SHARDS, BatchOrder

MEDIAN_SIGMA_SHARE = np.array([(100, 0.35, 0.45), (365, 0.45, 0.30), (148, 0.5, 0.18), (665, 0.7, 0.07)])


def draw(samples: int, seed: int = 0) -> np.ndarray:
    """Positions of each sample, ``[samples]``."""
    generator = np.random.default_rng(seed)
    median, sigma, share = MEDIAN_SIGMA_SHARE.T
    kind = generator.choice(4, size=samples, p=share)
    tokens = np.exp(np.log(median[kind]) + sigma[kind] * generator.standard_normal(samples))
    return np.minimum(2048, tokens).astype(np.int64) + 144


def computed(order: BatchOrder, lengths: np.ndarray, processes: int, epochs: int = 2) -> float:
    """Positions for every real one, the mean of a few epochs."""
    total = 0
    for epoch in range(epochs):
        work = [len(batch) * int(lengths[batch].max()) for batch in order.epoch(epoch)]
        total += sum(processes * max(work[i : i + processes]) for i in range(0, len(work), processes))
    return float(total / epochs / lengths.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--shard-samples", type=int, default=512)
    arguments = parser.parse_args()
    lengths = draw(arguments.samples)
    shards = np.arange(arguments.samples) // arguments.shard_samples
    print("| samples a batch | processes | any lengths | like lengths | an epoch laid out in |\n|---|---|---|---|---|")
    for processes in (1, 8):
        for size in (8, 16, 32):
            settings = {"seed": 0, "window": WINDOW_SHARDS, "batch_size": size, "per_step": processes, "lengths": lengths}
            plain = computed(BatchOrder(shards, **settings), lengths, processes)
            order = BatchOrder(shards, **settings, group_by_length=True)
            grouped = computed(order, lengths, processes)
            started = time.perf_counter()
            order.epoch(7)
            seconds = time.perf_counter() - started
            print(f"| {size} | {processes} | {plain:.2f} | {grouped:.2f} | {seconds:.2f} s |")


if __name__ == "__main__":
    main()
