"""The part of mpicoll that is compiled, where there is a compiler; everything else is in pyproject.toml."""

import os

import numpy
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "mpicoll._node",
            ["mpicoll/native/module.c", "mpicoll/native/node.c", "mpicoll/native/kernels.c"],
            depends=["mpicoll/native/node.h", "mpicoll/native/kernels.h", "mpicoll/native/kernels.inc"],
            include_dirs=[numpy.get_include()],
            # No -march: what is built on one node runs on the others.  No contraction: the same bits everywhere.
            extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"],
            # Without it everything works, by Python: a failure is told of by the compiler, and then passed over.
            optional=os.environ.get("MPICOLL_NATIVE") != "require",
        )
    ]
)
