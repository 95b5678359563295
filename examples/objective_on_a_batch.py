"""Load a cached row, and compute the objective on a batch: the public API in a few lines.

python examples/objective_on_a_batch.py --student STUDENT --cache CACHE --data train.json --images images
"""

import argparse

import alignkd

parser = argparse.ArgumentParser()
for name in ("student", "cache", "data", "images"):
    parser.add_argument(f"--{name}", required=True)
paths = vars(parser.parse_args())

reader = alignkd.CacheReader(paths["cache"])
row = reader.row(next(iter(reader)))
print(row.sample_id, {name: value.shape for name, value in row.values.items()})

config = alignkd.DistillConfig(**paths, out="unused", recipe=alignkd.get_recipe("align-kd", {"attention": "0.5"}))
run = alignkd.open_distillation(config)
batch, targets = run.batch([0, 1])
outcome = run.objective(batch, targets)
outcome["loss"].backward()
print(f"loss {outcome['loss'].item():.4f}", {name: round(term.item(), 4) for name, term in outcome["terms"].items()})
