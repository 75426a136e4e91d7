"""Millrace: streaming time-series forecasting on Kafka."""

import os

# Matrices here are small and many: threads of the linear algebra library wait for each other more than they work (four times slower on
# two busy cores). Counts where NumPy has not been imported yet.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
