# SPDX-License-Identifier: Apache-2.0
"""`headinfer bench`: the same work done by every contestant, in one process, beside two floors.

`cases` says what there is to measure, `program` runs it, `results` keeps it, `must_hold` judges it,
`tables` and `plots` show it. Everything but `program` and what it calls works without torch, so
that committed results can be looked at anywhere. docs/benchmarks.md has the method.
"""
