# SPDX-License-Identifier: Apache-2.0
"""Where headinfer meets transformers: the only package that imports it."""
