"""alignkd: distil a large vision-language model into a small one, from a cache of the teacher's targets.

1. ``alignkd cache-teacher`` runs the teacher once and writes its first-layer text-to-vision attention, projected vision
   tokens and top-k logits into a sharded cache.
2. ``alignkd distill`` trains the student from that cache; the teacher is never loaded.
"""

__version__ = "0.1.0"
