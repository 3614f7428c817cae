from benchmarks.paper.cli import main

raise SystemExit(main())
