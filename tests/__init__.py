import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; set before torch reads it
