"""Drawing for programs that ask over HTTP: `twostep serve`.

`engine` queues jobs and draws them, those that are alike together; it knows no web framework.
`catalogue` names what is served and fits wishes to it, `store` keeps jobs in a file, `metrics`
counts, `logs` and `tracing` write the log, `gate` lets requests in, `following` brings a job's
events to a connection, `app` puts these together, and each family of addresses is one file:
`openai_routes`, `openai_sound_routes`, `a1111_routes`, `native_routes`, `operation_routes`,
`page_routes`, `mcp_tools`. `items` makes files of whatever a model made.
`config` has the settings of a server, and `start` begins one from them; `reloading` keeps the
catalogue as the disk has it, `picture_filter` looks at what is drawn, and `cluster` draws with
replicas in Ray, which needs the extra `cluster`. All others need the extra `serve`.
`client` asks a server, and needs the extra `client` alone.
"""
