"""A whole job: ranks fail together, calls have a time limit, threads have cores, and what is wrong is found."""
