"""TokenFlow: the policy that schedules by the unread text of each reader (docs/scheduling.md)."""
