"""What a graph says about its values, found by following labels through it.

Two questions have the same engine (`following`): which channels may share a factor (`factors`,
`factor_rules`, `factor_walk`), and which place of which input an element comes from
(`positions`). What a mask hides is read off the operators that made it (`masks`). Nothing here
changes a graph.
"""
