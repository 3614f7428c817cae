"""The simulated device: clock, runner and transfers in virtual time, for the same EngineCore, Scheduler and manager."""
