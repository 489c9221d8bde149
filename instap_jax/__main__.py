import sys

from instap_jax.main import main

sys.exit(main())
