"""A matrix folded into the last linear layer of the MLP before each cut, fitted to the whole model's hidden states after the cut.

`sglp_llm.method.least_squares` has the equations. ReplaceMe (arXiv 2505.02819) fits such a map too, without the token weights and
without choosing the ridge on held-out sequences.
"""

from sglp_llm.compensation.base import LeastSquares
from sglp_llm.method.least_squares import MatrixEquations

METHOD = LeastSquares("linear", MatrixEquations, is_channelwise=False)
