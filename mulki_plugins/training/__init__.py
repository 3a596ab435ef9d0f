"""Training and evaluation of a recipe through Avalanche."""

import warnings

warnings.filterwarnings("ignore", message="no QP solver found")  # Avalanche imports qpsolvers, which nothing here uses
