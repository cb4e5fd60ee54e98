"""Drawing for programs that ask over HTTP: `twostep serve`.

`engine` queues jobs and draws them, those that are alike together; it knows no web framework.
`catalogue` names what is served and fits wishes to it, `gate` lets requests in, `following` brings
a job's events to a connection, `app` puts these together, and each family of addresses is one file:
`openai_routes`, `native_routes`. Needs the extra `serve`.
"""
