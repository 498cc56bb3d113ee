"""Strategies side by side at equal computation and equal seeds: what `pynas.compare` is made of.

`budget` counts gradient computations and lengthens strategies to equal numbers of them; `entries` reads what is asked;
`rows` reads finished runs; `tables` and `figures` show them. A strategy is compared because it is registered: it says
by `gradient_passes` what it computes, and is lengthened by `path_gradients` where it has that field.
"""
