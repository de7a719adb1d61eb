"""Seven multimodal tasks whose images are drawn from seeds, in the spirit of the paper's benchmarks."""

from collections.abc import Callable

import numpy as np

from genieblue.lab.tasks.charts import draw_chart
from genieblue.lab.tasks.counting import draw_counting
from genieblue.lab.tasks.digits import draw_digits
from genieblue.lab.tasks.drawn import Drawn
from genieblue.lab.tasks.lines import draw_line
from genieblue.lab.tasks.naming import draw_naming
from genieblue.lab.tasks.position import draw_position
from genieblue.lab.tasks.receipts import draw_receipt

# An image with questions, for a generator of random numbers; held-out ones are of materials that are never trained on.
TASKS: dict[str, Callable[[np.random.Generator, bool], Drawn]] = {
    "digits": draw_digits,
    "lines": draw_line,
    "receipts": draw_receipt,
    "charts": draw_chart,
    "counting": draw_counting,
    "position": draw_position,
    "naming": draw_naming,
}
