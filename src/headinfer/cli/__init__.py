# SPDX-License-Identifier: Apache-2.0
"""The command line: a shell over `headinfer.hf`; it knows no tensors and decides nothing.

Answers go to standard output, everything else to standard error. Nothing heavy is imported before
a command runs, so that help is instant.
"""
