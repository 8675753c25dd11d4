"""Learning from the policy's own responses: PPO, RLOO and GRPO from a reward, distillation from teachers.

Read the modules in this order:

config      every setting, with the paper its default comes from
experience  what an update learns from: rewards and advantages of a batch of responses
objectives  the losses of policy and critic
distillation  the divergence from teachers
update      one update, from prompts to new parameters
programs    the compiled programs that an update runs
layouts     programs that run on another mesh than the stage's
roles       the models: which are trained, which are frozen, where they come from
planned     the same update without devices, for `jaxllm plan`
scoring     the weighted sum of rewards; `rewards` and `numerals` hold the built-in ones, `step_rewards` those of steps
held_out    score, divergence and KL on held-out prompts
rollout_log rollouts.jsonl
"""
