"""Arrays in the memory of GPUs: the only modules that import CuPy.

CuPy is used where the program has imported it.  It is imported here only for a program that asks for a GPU
(``assignment``), or passes a device array of another library (``array``).

An array is read and written on a stream, the current one of its device unless another one is named: after everything
that was put on that stream before the call, and before everything that is put there after it.  Nothing else is
promised, as with any operation of CuPy, and so nothing more is waited for: the host waits where MPI, or another
process, reads.
"""
