"""One factor a channel of what the MLP before each cut adds: few numbers to fit, and every family can take them."""

from sglp_llm.compensation.base import LeastSquares
from sglp_llm.method.least_squares import ChannelEquations, FactorEquations

METHOD = LeastSquares("scale", ChannelEquations, is_channelwise=True)

ONE_FACTOR = LeastSquares("scale", FactorEquations, is_channelwise=True)
"""One factor for all channels of a cut."""
