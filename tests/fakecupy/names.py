"""What NumPy has and CuPy has not, and what arrays do by which functions."""

# What NumPy has and CuPy has not.
ABSENT = {
    *("asmatrix", "block", "bmat", "busday_count", "busday_offset", "busdaycalendar", "bytes_", "character"),
    *("clongdouble", "complex256", "datetime64", "datetime_as_string", "datetime_data", "einsum_path", "errstate"),
    *("flexible", "float128", "frompyfunc", "fromregex", "geomspace", "get_include", "getbufsize", "geterr"),
    *("geterrcall", "histogram_bin_edges", "info", "insert", "is_busday", "isnat", "longdouble", "matrix", "matvec"),
    *("memmap", "nanpercentile", "nanquantile", "ndenumerate", "nditer", "nested_iters", "object_", "polyder"),
    *("polydiv", "polyint", "recarray", "record", "setbufsize", "seterr", "seterrcall", "show_runtime", "spacing"),
    *("str_", "test", "timedelta64", "unstack", "vecdot", "vecmat", "void"),
}
LACKING = {"packbits": "axis", "unpackbits": "axis count", "partition": "kind order"}  # arguments of what it has
VIEWS = {
    *("reshape", "ravel", "transpose", "squeeze", "swapaxes", "moveaxis", "broadcast_to", "expand_dims", "atleast_1d"),
    *("atleast_2d", "split", "array_split", "hsplit", "vsplit", "diagonal", "real", "imag", "flip", "view"),
}
# What needs no values, and what needs them to know the shape of the result, and so waits.
ABOUT = {"shape", "ndim", "size", "may_share_memory", "shares_memory", "result_type", "can_cast", "iscomplexobj"}
WAITING = {"nonzero", "flatnonzero", "argwhere", "unique", "compress", "extract", "isscalar", "union1d", "setdiff1d"}
METHODS = [
    *("all", "any", "argmax", "argmin", "argsort", "clip", "conj", "cumsum", "dot", "flatten", "max", "mean", "min"),
    *("nonzero", "prod", "repeat", "round", "std", "sum", "take", "trace", "var", "reshape", "ravel", "transpose"),
    *("squeeze", "swapaxes", "diagonal", "view"),
]
