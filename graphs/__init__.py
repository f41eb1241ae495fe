"""The Serve applications: which deployments there are, and who holds a handle to whom."""
