"""The process of the controller: watches, work queue, leader election, probes and webhook."""
