"""One part each: attention, the scheduler, the HTTP side, the pipeline."""
