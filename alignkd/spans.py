"""Which characters of a conversation a token stands for, whatever the template and the tokenizer.

Characters are counted over the conversation's own text, turn after turn, without white space and without image tags: templates
add, move and strip these. A token of the template's own text stands for none: an empty span.

Shapes: L ids, T text rows.
"""

import numpy as np

NO_SPANS = np.zeros((0, 2), dtype=np.int32)
"""Of an input whose encoder gives no spans."""
