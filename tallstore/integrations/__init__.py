"""tallstore with other libraries; each is imported when it is asked for."""
