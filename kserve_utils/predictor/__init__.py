"""A detector behind KServe's own server: V1 and V2 REST, gRPC, whole scenes."""
