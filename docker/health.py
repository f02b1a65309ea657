"""Exit 0 if a party of the federation answers at ``/health``: python health.py PORT [CA.crt].

Standard library only: this runs every few seconds, in every container.
"""

from __future__ import annotations

import ssl
import sys
from urllib.request import urlopen

port, *ca = sys.argv[1:]
context = ssl.create_default_context(cafile=ca[0]) if ca else None
scheme = "https" if ca else "http"
with urlopen(f"{scheme}://localhost:{port}/health", timeout=3, context=context):
    pass  # anything but a success raises
