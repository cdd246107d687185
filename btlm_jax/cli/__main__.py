"""`python -m btlm_jax.cli`."""

import sys

from btlm_jax.cli import main

sys.exit(main())
