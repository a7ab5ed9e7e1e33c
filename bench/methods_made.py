"""One random adapter of every kind of method on a backbone of any shape, as its own library or format saves it.

What peft can make, peft makes; the rest is written by hand in weft's own formats or AdapterHub's. Sizes are those that
the methods' papers report as usual: rank 16, bottlenecks of a sixteenth, half a percent of the weights.
"""

from weft.bench import made_hub, made_native, made_peft
from weft.bench.made import Made

MADE: tuple[Made, ...] = (*made_peft.MADE, *made_native.MADE, *made_hub.MADE)
