"""The raw ops: the contract, its backends (`reference`, `native`, `triton`, `fake`), and `dispatch`, which chooses one.

`cases` calls each op as a block would, and `selftest` judges the results by the rule of `accuracy`.
"""
