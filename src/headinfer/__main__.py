# SPDX-License-Identifier: Apache-2.0
"""`python -m headinfer` is `headinfer`."""

from __future__ import annotations

from headinfer.cli.app import main

if __name__ == "__main__":
    main()
