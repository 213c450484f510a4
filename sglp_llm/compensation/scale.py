"""One factor per channel of the output of the MLP before each cut: few numbers to fit, and supported by every family."""

from sglp_llm.compensation.base import LeastSquares
from sglp_llm.method.least_squares import ChannelEquations, FactorEquations

METHOD = LeastSquares("scale", ChannelEquations, is_channelwise=True)

ONE_FACTOR = LeastSquares("scale", FactorEquations, is_channelwise=True)
"""One factor per cut for all channels."""
