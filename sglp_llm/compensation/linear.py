"""A matrix folded into the last linear of the MLP before each cut: what is left comes closest to what was there.

METHOD section 6; ReplaceMe (2505.02819) fits such a map too, without the weights of tokens and without the held-out choice.
"""

from sglp_llm.compensation.base import LeastSquares
from sglp_llm.method.least_squares import MatrixEquations

METHOD = LeastSquares("linear", MatrixEquations, is_channelwise=False)
