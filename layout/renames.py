import sys, pathlib
sys.path.insert(0, "layout")
from tool import *
root = pathlib.Path(sys.argv[1]).resolve()
T = """
runtime.distributed world=world_size leads=is_main_process joined=process_group one_batch=shard_batch everyone=gather_batch mine=local_rows mean=global_mean summed=all_reduce_sum together=all_gather_lists told=from_main_process first_alone=main_process_first one_of=process_label Share=BatchShard _Sum=_AllReduceSum _drawn=_draw_for_shard _peers=_peer_errors _summable=_reducible_dtype
runtime.deferred look=read_later Later=DeferredReads looking_later=defer_reads onto=to_device Then=Callback
runtime.rng key=derive_seed forked=fork_rng drawn_by=patched_random reseed=seed_all
runtime.files write=atomic_write write_text=atomic_write_text write_json=atomic_write_json locked=folder_lock
attacks.view View=ModelView viewed=model_view settle=check_result answer=logits_of
attacks.per_image_noise noise_of_each=per_image_noise in_own_noise=own_noise
attacks.library make=build_attack
norms MOST=MAX_EPS SLACK=ROUNDING reach=max_distance slack=tolerance
step unmoved=restored mode=module_mode Window=DetachedStep
fields parts=field_values fits=matches_type readable=type_name identity=fingerprint transform=map_schedules check=check_types hints_of=type_hints schedules=iter_schedules _held=_captured _held_texts=_captured_texts _source_mark=_source_hash
plugin_calls ask=call_plugin broken=plugin_error label=plugin_name where=source_location raised_at=error_location is_foreign=is_third_party OURS=PACKAGE
data.dataset Part=Split Images=ImageData batches=batch_indices digest=tensor_hash fingerprint_of=data_fingerprint _check_part=_check_split
data.sources as_part=as_split
data.testsets of_arrays=from_arrays of_images=from_image_data of_path=from_path in_turn=interleave_classes
records Begun=RunStarted Finished=RunFinished Attacked=AttackResult Attacking=AttackProgress Measuring=ProgressUpdate CellBegun=CellStarted CellDone=CellFinished StepDone=StepFinished EpochDone=EpochFinished Waiting=WaitingForFolder
text so_many=plural
train.metrics Gauges=StepMetrics gauge=step_metrics LOOK_AT_NATURAL=NATURAL_EVERY
train.dry_run rehearse=dry_run_step
train.train_step attacked=run_attack perturbed=weight_perturbation work_through=train_step updater=make_update _Launched=QueuedStep _launch=queue_step _stopped=_nonfinite_error _culprit=_nonfinite_source
train.loop _begun=_run_started _Clock=_Forecaster _read=_drain
models.classifier response=example_logits try_out=check_forward
models.precision Decision=PrecisionChoice Forms=ComputeModels decide=choose_precision forms=compute_models _attacked=_attack_model
models.folded Half=Autocast Twin=FoldedModel
models.cuda_graphs Recorded=CudaGraph record=capture Graph=GraphRecorder wanted=enabled _Played=_Replay
evaluation.exact_inference Room=BatchSizer Sliced=FixedBatch exact=exact_inference Likeness=SearchModel quick=make_search_model searched=search_view _regular=_is_batch_invariant
evaluation.evaluator look=clean_pass attempt=run_attack trial=evaluate_attack verdict=attack_result Named=AttackInfo counted=accuracy_row planned=parse_attacks named=unique_names room_of=batch_sizer images=image_batch floats=as_floats CHUNK=BLOCK
evaluation.attack_specs Plan=AttackSpec plan=attack_spec is_ours=is_built_in check_own=check_custom cost=passes_per_image
evaluation.ledger joined=concatenate text_of=rows_as_text seal=row_seal
evaluation.storage Held=StoredEvaluation summed=summarize told_of=describe_data sealed=with_seal read_folder=read_evaluation
evaluation.task Task=EvaluationTask differences=spec_differences others=attack_differences
evaluation.runner examine=run_evaluation merge=merge_shards
evaluation.model_loading Subject=LoadedModel open_subject=load_model open_data=load_data reopen=reload_model _called=_display_name _named=_given_model _networks=_candidate_networks _chosen=_choose _told=_choice_notes _assumed=_assumption_notes _source=_source_hash
evaluation.normalization CONVENTIONS=NORMALIZATIONS read_convention=parse_normalization plausible=usual_normalizations spelt=format_normalization shortlisted=shortlist fitting=best_fit PROBED=PROBE_IMAGES _worse=_is_worse _answers=_logits
evaluation.verify _near=_is_close
evaluation.compare Compared=ComparedAttack
checkpoints.infer.candidates Reading=Candidate readings=candidates
checkpoints.infer.layers natural=natural_key
checkpoints.infer.sequential Step=ConvStep Solution=PartialChain
checkpoints.infer.residual Block=BlockLayout
checkpoints.file_formats Opened=RawCheckpoint read=read_file check_there=check_exists LARGEST=MAX_BYTES
checkpoints.inspection Report=Inspection inspect=inspect_checkpoint
checkpoints.checkpoint examine=inspect_content
checkpoints.state_dicts Found=StateDicts Cleaned=CleanStateDict find=find_state_dicts choose=choose_state_dict clean=clean_state_dict
checkpoints.load fit=load_strict make=build_network
config.catalog places=module_of_name entries=catalog_entries
config.overrides read=parse_value override=apply_overrides
config.loader find=find_plugin load_source=load_module
margin_lab.attack_paths Plan=PathSpec Path=AttackPath plans=path_specs walk=run_paths grafted=second_path
margin_lab.paper_figures Sitter=FigureInputs Drawn=FigureData Telling=FigureProgress figure=compute_figure save=save_figure
margin_lab.measure Task=MarginTask lab=measure_margins prepare=make_task save=save_lab same=same_measurement exactly=paired_auroc
margin_lab.margin_values said=margin_values cost=margin_cost
margin_lab.statistics behind=auroc_behind
report.tables Grid=TextTable
report.log_lines line=log_line
report.svg bar=bar_chart
report.bench table=bench_table draw=draw_bench save=save_bench
trials.fork plan=plan_jobs way=shared_prefix own=own_job begun=started trained=is_trained
trials.execute work=run_job in_order=ordered here=run_here
trials.summary Spread=SeedSpread spread=seed_spread
trials.paper kin=related_methods
"""
table = {}
for line in T.strip().splitlines():
    mod, *pairs = line.split()
    for pr in pairs:
        o, n = pr.split("=")
        table[(f"robustmail.{mod}", o)] = n
A = dict(x.split("=") for x in """
reckon=compute_loss turns=change_points kept=eval_model unread=queue patiently=with_oom_retry
""".split())
missing = []
for (m, o) in table:
    p = root / (m.replace(".", "/") + ".py")
    if not p.exists(): p = root / m.replace(".", "/") / "__init__.py"
    if not p.exists() or o not in {d for n in ast.parse(p.read_text()).body for d in defined(n)}: missing.append((m, o))
print("not there:", missing)
clash = []
for (m, o), n in table.items():
    p = root / (m.replace(".", "/") + ".py")
    if p.exists() and n in {t.string for t in tokenize.generate_tokens(io.StringIO(p.read_text()).readline) if t.type == tokenize.NAME}: clash.append((m, o, n))
print("new name already used in module:", clash)
apply_renames(root, table, A)
