"""`python -m lowmem_gblm` is `lowmem-gblm`."""

from lowmem_gblm.cli.main import main

raise SystemExit(main())
