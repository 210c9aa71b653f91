"""What shows and tests the service with real engines: small models, one vLLM engine a process, `cachesvc demo`.

Covers: everything above the connector that starts engines. Not here: the connector. Only the child process of
`demo.engine` imports vLLM; the rest runs wherever the daemon does.
"""
