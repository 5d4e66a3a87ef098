"""Draw the sample: python -m sample_data --output_dir DIR."""

import sys

from .dataset import main

sys.exit(main())
