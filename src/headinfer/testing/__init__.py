# SPDX-License-Identifier: Apache-2.0
"""The test kit: transfer engines that show a missing wait, the numerics rule, tiny models.

Shipped for whoever adds a tier, a format or an attention implementation; product code never
imports it.
"""
