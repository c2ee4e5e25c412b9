"""Audio in, transcript out.

numpy's OpenBLAS keeps a thread for each core spinning for 100 ms after every product, and the only products here are a
spectrogram's for each recognition: on a live stream that cost more CPU than the recogniser itself. It looks at its
environment once, when numpy is loaded, so one thread has to be said here, before any module below imports numpy.
Whoever sets the variable himself is left alone.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
