"""Entry point of `python -m lowmem_gblm`, which is the command `lowmem-gblm`."""

from lowmem_gblm.cli.main import main

raise SystemExit(main())
